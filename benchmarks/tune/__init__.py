"""What each way of storing costs and loses, measured on a user's own cases and teachers."""
