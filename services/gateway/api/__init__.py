"""The HTTP edge: everything is checked here, before anything is stored or published."""
