"""What stage one will take: units, bytes, files, hours, memory; before it starts."""
