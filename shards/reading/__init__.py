"""Reading a set: store, order, loader, damage."""
