"""What will be needed: models of which experts the next layers and tokens use."""
