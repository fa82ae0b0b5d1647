"""Reading and saving adapters: folders (``sources``, ``reading``), the Hub (``hub``), a fast reader of weights
(``weights_file``), PEFT's older format (``bin_file``), saving (``saving``), and hooks that correct ``state_dict``
(``state_dicts``).
"""
