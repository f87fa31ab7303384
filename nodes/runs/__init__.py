"""What lives longer than one execution of a node: runs, their states, the loop."""
