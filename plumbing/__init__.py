"""What a first reading can skip, in rooms: each folder's first line says what it is for."""
