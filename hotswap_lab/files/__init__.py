"""Reading and saving adapters: from folders (``sources``, ``reading``) and the Hub (``hub``), with a search of the Hub
(``search``), a fast reader of weights (``weights_file``), PEFT's older format (``bin_file``), saving (``saving``), and
hooks that correct ``state_dict`` (``state_dicts``).
"""
