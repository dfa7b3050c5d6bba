"""How tiny-r1 is made: questions, network, optimizer, export and evaluation."""
