"""The command line's longer commands, a file each: a command's arguments, and what it does with them.

main.py has the table of all commands and the short ones, ../arguments.py the arguments of these. No other code
imports this: here, as in main.py, things are written to the terminal. Heavy imports go inside the functions.
"""
