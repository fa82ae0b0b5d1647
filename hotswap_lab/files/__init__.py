"""Where adapters come from and go to: the Hub (``hub``), its search (``search``), saving (``saving``)."""
