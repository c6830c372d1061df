// No assembly: with a file of it, Go lets abi.go declare a function of the runtime's.
