"""GSM-Infinite: word problems with a given number of operations and any length."""
