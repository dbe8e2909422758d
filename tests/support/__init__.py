"""What tests share: paths, tiny models, pictures, checkpoints, kernels' suites. No test is in here."""
