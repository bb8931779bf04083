"""The database's history: plain SQL, applied in order by ``release``, each additive to the one before."""
