"""What is true of a model or a dataset: metrics, selection, baselines, audit, comparison."""
