"""A trained model in use: predictions, exports, a page for the browser, the Hub, a Space."""
