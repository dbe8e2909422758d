"""Methods that learn from pictures without labels: pseudo-labels, transport to the class names, labels on request."""
