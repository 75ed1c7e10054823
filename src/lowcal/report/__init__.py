"""Tables, figures and one HTML page, made from run folders alone."""
