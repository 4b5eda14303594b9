"""What teachers say together, and how far each of them counts."""
