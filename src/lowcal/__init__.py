"""Low-calorie SGD: train the first layers of a network locally as training goes on."""
