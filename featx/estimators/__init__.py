"""One file an estimator: parameters, validation and scikit-learn's protocol around what the rooms below compute."""
