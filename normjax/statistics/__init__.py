"""Where statistics come from and where they are kept."""
