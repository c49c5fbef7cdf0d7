"""What hears, thinks and speaks behind the providers."""
