"""What a person looks at, and the files that programs read."""
