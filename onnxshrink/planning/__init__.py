"""How a plan is made: sets that only grow, until they agree with every node. Names no operator."""
