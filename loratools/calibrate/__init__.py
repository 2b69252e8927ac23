"""For those who have the model at hand (extra ``calibrate``): statistics of its modules, ranks annealed in training."""
