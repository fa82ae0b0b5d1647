"""Where adapters come from and go to: folders (``sources``, ``reading``), the Hub (``hub``), its search (``search``), a
fast way to read weights (``weights_file``), PEFT's older format (``bin_file``), saving (``saving``), and what
``state_dict`` shows of a model (``state_dicts``).
"""
