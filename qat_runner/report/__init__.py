"""What people look at: plots and tables of finished runs."""
