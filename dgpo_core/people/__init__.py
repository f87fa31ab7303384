"""What people say about pictures: preferences, rated folders, asking."""
