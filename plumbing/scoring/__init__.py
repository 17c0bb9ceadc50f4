"""What a model answers, how it is counted and shown: accuracy, new texts, plots, the model card."""
