"""What a run found, as data (`results.py`), a table (`tables.py`), pictures (`pictures.py`) and a page (`html.py`)."""
