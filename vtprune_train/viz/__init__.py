"""Images and pages that show which visual tokens are kept."""
