"""From files and tables to labelled images that a model can see."""
