/* u64 hypercall_64(u64 control, u64 input, u64 output): RCX, RDX, R8; result in RAX. */
    .text
    .globl hypercall_64
hypercall_64:
    mov %rdi, %rcx
    mov %rdx, %r8
    mov %rsi, %rdx
    mov $hypercall_page, %eax
    jmp *%rax

    .bss
    .globl hypercall_page
    .balign 4096
hypercall_page:
    .skip 4096

    .section .note.GNU-stack, "", @progbits
