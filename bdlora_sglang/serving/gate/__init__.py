"""What stands between clients and SGLang: requests are checked, names resolved, adapters guarded."""
