"""DeepSpeed: start, gradients, state. No other package reads its attributes."""
