"""A trained model in use: predictions, the Hub, a Space."""
