"""What a model is: its zoo, its loading, one vocabulary for every family, and what a head owns."""
