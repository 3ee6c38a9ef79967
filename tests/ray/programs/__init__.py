"""Programs that tests run as a user would, and the lines they are expected to leave behind."""
