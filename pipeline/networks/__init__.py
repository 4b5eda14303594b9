"""What teachers and students share: networks by name, windows, tensor files."""
