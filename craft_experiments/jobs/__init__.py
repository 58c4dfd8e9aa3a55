"""The jobs behind a table: what each kind runs, when it is done, and which record it leaves. One file per kind."""
