"""Reading and saving adapters: folders (``sources``, ``reading``), the Hub (``hub``), a fast reader of weights
(``weights_file``), PEFT's older format (``bin_file``) and saving (``saving``).
"""
