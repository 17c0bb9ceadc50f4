"""An adapter on any linear layer: attached, merged, counted, in PEFT's format."""
