"""The exit threshold with a guarantee: the test, the questions it is made on, and when it holds at run time."""
