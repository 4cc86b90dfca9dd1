"""Native and custom operators with their dispatch."""
