"""The web page on which one sees and hears what drives each feature."""
