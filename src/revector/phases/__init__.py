"""One verb a module, each with its SQL beside it; none knows its neighbours, the stage or the terminal."""
