"""GSM-Infinite: word problems of a given number of operations, at any length."""
