"""Commands around the package: set-up, training, tests, benchmarks."""
