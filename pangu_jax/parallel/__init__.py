"""How the model lies on a mesh: layouts and the boundaries where data crosses devices."""
