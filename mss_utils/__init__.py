"""The helper behind the notebooks of a music source separation report."""
