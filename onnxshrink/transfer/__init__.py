"""Plans that travel: a model is analysed in one place, and what was decided is carried out in another."""
