/* Entry as the Multiboot specification says, in 32-bit protected mode without paging; and hypercalls. */
#define CODE 0x08
#define DATA 0x10
#define STACK_SIZE 16384

    .section .text.entry, "ax"
    .balign 4
    .long 0x1badb002, 0, -0x1badb002
    .globl fuzz_entry
fuzz_entry:
    cli
    cld
    lgdt gdt_pointer
    ljmp $CODE, $1f
1:  mov $DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $stack + STACK_SIZE, %esp
    push %ebx
    call fuzz_main

/* u64 hypercall(u64 control, u64 input, u64 output): what the hypercall page does for 32-bit callers, because the page
 * may lie under another one. */
    .text
    .globl hypercall
hypercall:
    push %ebx
    push %esi
    push %edi
    mov 16(%esp), %eax
    mov 20(%esp), %edx
    mov 24(%esp), %ecx
    mov 28(%esp), %ebx
    mov 32(%esp), %esi
    mov 36(%esp), %edi
    outb %al, $0xeb
    pop %edi
    pop %esi
    pop %ebx
    ret

    .data
    .balign 8
gdt:
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
    .word 23
    .long gdt

    .bss
    .balign 16
stack:
    .skip STACK_SIZE
    .section .note.GNU-stack, "", @progbits
