"""What a model answers, how it is counted and shown: accuracy, new texts, a plot of the losses, the model card."""
